"""The jobs of an example in the process of the test: starting one for each takes seconds."""

import pickle


def run_all(title, function, jobs, workers, total):
    """As support.processes.run_all. Function and results still travel."""
    return {job: pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(function))(*job))) for job in jobs}
