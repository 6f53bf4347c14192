"""What users are told, in the product and by e-mail.

A message is a row, written in the caller's transaction, with a key that says which event it tells of: nothing is said
twice, and nothing is said of what was rolled back. A beat task sends the e-mails of the rows that wait for it.
"""
