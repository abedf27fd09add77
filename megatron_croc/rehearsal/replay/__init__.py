"""All ranks of a job in time, from the traces of its classes of ranks, without a GPU.

programs       a trace for every rank, and the ranks that are worth simulating
rules          the rules of NCCL and of gloo
costs          seconds of an operation: measured, or peak x efficiency
nodes          work on a device, and where ranks meet
simulation     hosts, streams and communicators of all ranks, event by event
deadlock       who waits for whom when nothing can go on
timeline       step time, bubble, exposed communication, imbalance, memory
chrome_trace   a file for chrome://tracing and Perfetto
picture        the step as SVG
"""
