"""The engines: who carries bytes between the server and the clients."""
