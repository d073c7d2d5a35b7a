"""Loquent's clients: the command line, the terminal's captions, and a small WebSocket client."""
