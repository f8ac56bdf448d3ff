"""The models of the zoo, by the package they come from: random weights, small inputs."""
