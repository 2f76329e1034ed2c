"""The sweep flow: trainings with other values of `finetune`, compared on the validation rows."""
