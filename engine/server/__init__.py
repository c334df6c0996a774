"""The gRPC service of an engine process."""
