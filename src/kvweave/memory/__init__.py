"""What a layer holds in memory: slots in full precision, packed, or in buffers of fixed shape."""
