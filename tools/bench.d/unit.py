"""What a name of the benchmark is to the program that runs it."""


class Unit:
    """Measures some keys together, because they share what is expensive to set up.

    `run(settings, wanted, report)` measures the wanted keys.
    """

    def __init__(self, name, keys, run):
        self.name, self.keys, self.run = name, list(keys), run
