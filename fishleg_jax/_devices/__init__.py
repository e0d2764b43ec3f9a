"""Arrays over several devices: meshes, shardings, named axes."""
