"""What the compilers make of every Triton kernel, without a GPU. report.py prints it, a test guards it.

cases.py     which launches to look at, recorded from the package's own launchers
build.py     compiles one recorded launch for one architecture
program.py   control-flow graph of an assembly listing, and the path that nearly every logit takes through it
machine.py   reads NVIDIA's SASS and AMD's assembly into a Program
model.py     occupancy, and the bound that a data sheet predicts
waves.py     what splitting rows over programs is worth, by the number of rows
table.py     rows to text
tokens.py    the kernels over tokens instead of logits, and what they occupy
"""
