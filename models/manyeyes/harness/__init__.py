"""What every step runs in."""
