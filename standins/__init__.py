"""Local stand-ins that speak the real wire protocols of the services Postmate uses."""
