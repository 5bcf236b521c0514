"""The paper as a pipeline: prepare, train, evaluate, compare; params.yaml in, results/report out."""
