"""What is done to the books as a whole: proof, retention, personal data."""
