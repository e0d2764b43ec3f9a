"""Scripts that a person runs: data sets, networks, and the experiments of the README."""
