"""The Python side of the native decoder, and the eager loop beside it; nothing else imports them."""
