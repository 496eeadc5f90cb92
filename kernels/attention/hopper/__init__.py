"""Decode attention over trellis codes for GPUs with the shared memory of Hopper, written lane by lane in Gluon."""
