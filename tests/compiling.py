"""How tests have programs compiled: quickly, since most run once or twice.

Without its newer emitters of fused loops XLA compiles for a CPU in a third of the time.
"""

FLAGS = (
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
    "--xla_cpu_use_fusion_emitters=false",
)
XLA_FLAGS = " ".join(FLAGS)  # for the commands that tests start, on one device
