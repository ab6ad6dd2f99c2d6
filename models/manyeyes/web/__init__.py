"""What is asked of other machines: language models behind an endpoint, and pages and images of the web."""
