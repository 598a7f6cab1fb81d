"""What travels between workers: arrays in, arrays out. It knows neither Optax nor meshes."""
