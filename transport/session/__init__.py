"""One session between a sender and a receiver: connections, greeting, encryption, closing."""
