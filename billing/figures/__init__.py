"""What the business reads."""
