"""Ask the TPU compiler what an experiment needs on a TPU pod, without a TPU.

    experiment → step and shapes on a topology → compiled program → schedule → plan

`topology` opens libtpu, `experiment` builds the real train step for its devices, `schedule` reads
the compiled program, `plan` puts the answer together, `suggest` compares settings.
"""
