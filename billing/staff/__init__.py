"""What admins do to the accounts of others."""
