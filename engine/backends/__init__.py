"""What produces tokens behind the gRPC service: one interface, one module per implementation."""
