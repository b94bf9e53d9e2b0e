"""`jaxinfer bench serve`: an open loop of requests against a running server. Knows grpc, never jax."""
