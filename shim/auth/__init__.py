"""Who is asking: keys, credentials in headers, and what they allow."""
