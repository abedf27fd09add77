# Sourced by run.sh and smollm2.sh: records and shards of easy-VQA, and a tower that sees them.

# prepare FOLDER [OPTION OF records.py ...]; what is there already is kept.
prepare() {
    local data=$1
    shift
    if [[ ! -e $data/shards/.done ]]; then
        "$PYTHON" benchmarks/evidence/records.py --out "$data" "$@"
        for name in {,valid_}{pretrain_mlp,pretrain_croc,finetune}; do
            croc data preprocess --input "$data/$name.json" --image-folder "$data/images" \
                --output "$data/shards/$name"
        done
        touch "$data/shards/.done"
    fi
    [[ -e $data/tower/zero_shot.json ]] ||
        "$PYTHON" benchmarks/evidence/tower.py --data "$data" --out "$data/tower"
}
