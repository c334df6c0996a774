"""What a workspace may use: requests in a minute, tokens in a day."""
