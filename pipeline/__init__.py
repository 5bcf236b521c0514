"""The paper as a pipeline: prepare, train, evaluate, compare, report."""
