"""Pictures that clients send: files to pixels, pixels to patches."""
