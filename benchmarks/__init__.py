"""Speed and memory. Each script prints one table and writes it to benchmarks/results/, with the machine it ran on."""
