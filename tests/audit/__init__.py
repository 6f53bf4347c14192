"""`make audit`: Lighthouse and axe over the product as it runs in production."""
