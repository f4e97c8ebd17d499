"""Share a trained model: its card, its adapter, and a repository on the Hub."""
