"""Everything that knows kfp."""
