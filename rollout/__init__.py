"""The student's own answers: prompts, sampling, grading, and the stream the training loop draws rollouts from."""
