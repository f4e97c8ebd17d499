"""Servers of models: the client of OpenAI-compatible servers, and programs that start a server."""
