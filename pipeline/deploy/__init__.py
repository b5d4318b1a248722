"""A verified engine, or its graph, as a model that answers: in MLflow, over HTTP and at the terminal."""
