"""What stock engines need to decode on from exported contexts (`cache.export`); nothing of kvweave's core."""
