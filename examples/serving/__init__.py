"""The parts of `disaggregated_serving.py`: the processes, what they say, and what people see."""
