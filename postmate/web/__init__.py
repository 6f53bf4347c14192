"""What every request passes, and what tells whether all is well: headers, logs, metrics, health, outages."""
