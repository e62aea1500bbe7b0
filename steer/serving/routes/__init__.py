"""Routes of the server, one router a file."""
