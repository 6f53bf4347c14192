"""What knows no model and no product."""
