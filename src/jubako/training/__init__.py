"""Fine-tuning: what is asked and accepted (no torch), and the trainer, a process of its own.

``python -m jubako.training FOLDER`` makes an adapter of the plan and the pictures in a folder.
"""
