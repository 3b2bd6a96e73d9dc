"""Programs that call an API as the manual of their client library shows."""
