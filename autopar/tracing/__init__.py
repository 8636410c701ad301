"""How a model becomes a joint graph. The face is autopar.trace; read in this order:

shadow      a copy of the model whose tensors are fake
leaves      the tensors and constants among arguments and results, with readable paths
capture     Dynamo, then AOTAutograd
assemble    descriptors and phases: from AOTAutograd's graph to a Trace
clean       dead code, no-ops, repeated expressions
types       Trace and its parts
diagnose    torch's exceptions as TraceError with the user's line
"""
