"""Everything on one machine out of wheels: `make run` and `make run-production`."""
