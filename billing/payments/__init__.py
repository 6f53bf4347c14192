"""Money: what is bought, charged and paid back, through Stripe."""
