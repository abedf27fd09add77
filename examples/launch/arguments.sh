# shellcheck shell=bash
# From the variables a user sets to the arguments of `croc train`; sourced by run.sh and
# slurm.sh after STAGE and CONFIG are set.
#
#   DATA        folders of shards, separated by blanks (croc data preprocess writes them)
#   TOKENIZER   tokenizer.model of the language model, or its folder for a Hugging Face tokenizer
#   START       what the stage starts from: the checkpoints of the stage before, or a model folder
#               in Hugging Face's format
#   SAVE        folder for checkpoints and logs; a run that finds its own there goes on
#   VALID_DATA  (optional) folders of shards to validate on

: "${DATA:?set DATA to folders of shards}"
: "${TOKENIZER:?set TOKENIZER to the tokenizer of the language model}"
: "${START:?set START to the checkpoints of the stage before, or a Hugging Face folder}"
SAVE=${SAVE:-checkpoints/$STAGE}
read -ra data_folders <<<"$DATA"
read -ra valid_folders <<<"${VALID_DATA:-}"

MODEL_ARGS=(--config "$CONFIG" --pretrained-checkpoint "$START")
DATA_ARGS=(--data-path "${data_folders[@]}" --tokenizer-model "$TOKENIZER")
((${#valid_folders[@]} == 0)) || DATA_ARGS+=(--valid-data-path "${valid_folders[@]}")
TRAINING_ARGS=(--save "$SAVE")
LOGGING_ARGS=()
[[ -z ${WANDB_PROJECT:-} ]] || LOGGING_ARGS+=(--wandb-project "$WANDB_PROJECT")

# shellcheck disable=SC2034  # used by the script that sources this one
TRAIN_ARGS=("${MODEL_ARGS[@]}" "${DATA_ARGS[@]}" "${TRAINING_ARGS[@]}" "${LOGGING_ARGS[@]}")
