"""How processes come to be: spawning, clusters, devices, signals."""
