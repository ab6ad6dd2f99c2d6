from tests.pipelines.conftest import toy_checkout, toy_snapshot

__all__ = ["toy_checkout", "toy_snapshot"]
