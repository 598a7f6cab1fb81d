"""What `make test` leaves out, and what each of these tests alone catches.

`make test` should take 8 minutes on two cores from a fresh clone, so it runs the tests that
catch most. conftest.py marks the others by these tables:

    FURTHER_CASES   `make test` runs some cases of these tests; `pytest.param` marks the others
                    `thorough` in the test's own file
    THOROUGH        these tests repeat a property over more cases than a quick test does, or check
                    a property that few changes touch; their programs are not optimised
    SLOW            these tests start processes or compute for long, so their programs are optimised
"""

FURTHER_CASES = {
    "test_bucket_wrappers": {"multi_steps_may_hold_buckets": "MultiSteps inside a bucket"},
    "test_buckets": {
        "error_memories_with_faults_in_any_bucket_equal_the_reference": "eight workers",
        "scales_of_small_leaves_differ_by_rounding": "all codecs",
        "updates_equal_those_of_one_message_bit_for_bit": "all optimisers, codecs and transports",
        "votes_with_faults_in_any_bucket_equal_the_reference": "M from 2 to 8",
        "workers_may_have_several_devices": "memories of sharded leaves",
    },
    "test_collectives": {
        "votes_equal_the_reference_with_any_number_of_absent_workers": "M from 1 to 9",
        "votes_on_large_leaves_equal_the_reference": "M from 1 to 9, above 16,384 words",
    },
    "test_diloco": {
        "parameters_may_be_sharded_within_workers": "axes of mixed types, and specs beside types",
        "rounds_equal_the_reference": "H of 1, 2 and 3, with 1, 2 and 4 workers",
    },
    "test_means": {
        "means_of_signs_equal_the_reference_with_any_number_of_absent_workers": "M from 1 to 9",
    },
    "test_overlap": {
        "results_are_those_of_the_step_bit_for_bit": "kinds of losses",
        "the_program_has_the_same_collectives_and_barriers_beside": "kinds of losses",
        "train_step_equals_a_gradient_and_an_update_bit_for_bit": "signs, and sums of signs",
    },
    "test_pvote_scatter": {"parts_equal_the_reference_along_every_dimension": "vmap and pmap"},
    "test_scaled_signs": {
        "fifty_steps_with_both_memories_equal_the_reference": "M from 1 to 9, three block sizes",
    },
    "test_sharded_params": {
        "feedback_of_sharded_leaves_follows_the_reference": "meshes, specs and codecs",
        "training_gives_the_same_parameters_on_every_mesh": "meshes of up to three axes",
    },
}

THOROUGH = {
    "test_accelerator_benchmark": {
        "simulated_steps_equal_steps_of_the_optimizer_under_vmap": "benchmarks/accelerator.py",
    },
    "test_agreement": {
        "share_covers_all_blocks_of_sharded_leaves": "agreement under param_specs",
    },
    "test_bad_requests": {
        "ten_thousand_bad_requests_change_nothing": "memory of the vote server that grows slowly",
    },
    "test_benchmarks": {
        "counting_and_its_references_give_the_majority_of_participants": "benchmarks/kernels.py",
        "a_step_along_packed_words_follows_their_signs": "benchmarks/kernels.py",
        "compiled_programs_send_the_bytes_of_the_formula": "benchmarks/scaling.py",
        "a_timed_step_equals_a_step_of_the_optimizer": "benchmarks/step.py",
    },
    "test_bucket_wrappers": {
        "a_resized_state_continues_like_the_state_of_one_message": "rows and parts of a bucket",
        "a_restored_run_equals_the_uninterrupted_run_bit_for_bit": "buckets that were saved",
        "metrics_of_a_state_in_buckets_are_those_of_all_votes": "names of metrics",
    },
    "test_buckets": {
        "large_leaves_have_equal_scales": "leaves that are not bundled",
    },
    "test_checkpoints": {
        "a_restored_run_equals_the_uninterrupted_run_bit_for_bit": "state that Orbax does not keep",
        "training_continues_with_another_number_of_workers_without_a_jump_in_loss": "a resize",
    },
    "test_collectives": {
        "leaves_around_every_size_of_parts_are_decided_completely": "sizes around 16,384 words",
    },
    "test_compressors": {
        "a_fraction_in_an_array_keeps_the_same_count_compiled_and_eagerly": "rounding of fractions",
    },
    "test_commits_model": {
        "main_servers_and_a_shard_may_die_at_any_moment": "orders of several failures",
    },
    "test_conformance": {
        "compiled_equals_eager": "Python side effects, and values that tracing freezes",
        "no_dtype_is_promoted_by_accident": "promotion under strict dtype rules",
        "scalars_and_empty_leaves_come_out_finite": "divisions by an empty leaf's size",
        "settings_of_jax_change_nothing": "x64, strict promotion, no jit, rank promotion",
        "update_works_without_parameters_where_none_are_used": "needless reads of params",
    },
    "test_docs": {
        "code_blocks_of_a_page_run_in_order": "examples of the documentation that do not run",
    },
    "test_diloco_state": {
        "a_run_restored_in_the_middle_of_a_round_continues_bit_for_bit": "state that is not saved",
    },
    "test_fragments": {
        "a_resize_between_exchanges_keeps_every_fragment": "rows of fragments",
        "the_bytes_of_an_exchange_are_a_fragments_share": "exchanges of leaves that are not due",
        "fragments_may_be_sharded_within_workers": "specs of fragments",
    },
    "test_fuzz": {
        "packing_and_unpacking_of_ten_thousand_arrays": "shapes that nobody thought of",
        "packing_and_unpacking_of_ten_thousand_trees": "bundles that nobody thought of",
        "sealing_and_unsealing_of_ten_thousand_messages": "sizes around every boundary",
    },
    "test_layout": {
        "per_worker_leaves_are_the_leaves_that_differ_when_workers_run": "the walk",
    },
    "test_means": {"many_workers_are_counted_exactly": "counting in a loop, above 128 workers"},
    "test_mean_optimizers": {"a_step_of_ssdm_is_unbiased": "a bias in random signs"},
    "test_overlap": {
        "a_loss_may_have_auxiliary_results": "values beside the loss",
        "faults_exclude_the_same_workers": "flags that cross a barrier",
        "parameters_may_be_in_half_precision": "dtypes that cross a barrier",
    },
    "test_participation": {
        "one_nonfinite_block_of_a_sharded_leaf_excludes_its_worker": "finiteness per block",
    },
    "test_orthogonal": {
        "sharded_matrices_are_orthogonalized_as_a_whole": "specs of matrices on kinds of axes",
    },
    "test_one_bit_adam": {
        "leaves_that_are_sharded_within_a_worker_equal_the_reference": "specs of moments",
    },
    "test_muon": {
        "sharded_matrices_take_the_steps_of_whole_matrices": "the whole optimiser on shards",
    },
    "test_state": {
        "resize_works_for_numbers_that_the_transformation_does_not_support": "few workers",
    },
    "test_properties": {"steps_keep_shapes_dtypes_and_finiteness": "extreme values, by Hypothesis"},
    "test_rounds_model": {
        "a_job_and_the_server_may_die_at_any_moment": "orders of several failures",
    },
    "test_scaled_signs": {
        "a_checkpoint_continues_the_same_on_every_mesh": "scales that depend on the mesh",
        "a_transformer_sends_one_bit_each_way": "bytes of 200 leaves",
        "programs_grow_linearly_with_the_number_of_small_leaves": "quadratic programs",
        "temporary_memory_of_small_leaves_is_bounded_by_their_size": "memory of many small leaves",
        "the_formula_equals_the_bytes_of_the_program": "wire_bytes of scaled signs",
    },
    "test_sharded_params": {
        "an_update_of_sharded_parameters_sends_no_large_floating_point_array": "hidden gathers",
        "memories_of_sharded_leaves_survive_a_resize_and_a_restore": "other numbers of workers",
    },
    "test_ballots": {"the_dither_does_not_drift": "resonances of the dither over 2,000 steps"},
    "test_testing": {
        "colluders_vote_against_the_honest_majority": "the worst attack",
        "random_updates_keep_the_size_and_differ_by_worker_step_and_key": "the random attack",
    },
    "test_updates": {
        "an_update_outside_jit_compiles_once": "hundreds of programs in eager updates",
        "workers_may_lie_along_several_axes": "tuples of axes under DataParallel",
    },
    "test_weighted_votes": {
        "few_workers_have_reputations_too": "reputations of one to three workers",
        "reputations_cover_all_blocks_of_sharded_leaves": "reputations under param_specs",
        "weighted_votes_equal_the_reference_with_any_number_of_workers": "M from 1 to 8, all rules",
    },
    "test_wrappers": {
        "what_comes_after_it_sees_the_update_that_all_workers_share": "each of Optax's wrappers",
    },
    "test_varying": {"the_walk_finds_the_outputs_that_differ": "primitives that the walk misreads"},
}

SLOW = {
    "test_accelerator_benchmark": {
        "steps_and_training_steps_are_compared_with_their_reference": "benchmarks/accelerator.py",
    },
    "test_agreement": {
        "an_inverting_worker_is_flagged_within_twenty_steps": "the power of opposition",
        "no_honest_worker_is_flagged_when_coordinates_are_dead": "false alarms",
        "no_worker_is_flagged_in_a_thousand_clean_steps": "false alarms on real gradients",
    },
    "test_benchmarks": {
        "an_interrupted_run_leaves_no_namespaces": "the clean-up of benchmarks/network.py",
        "crossover_prints_and_plots_a_sweep": "benchmarks/crossover.py",
        "kernels_reports_ratios_to_the_reference": "benchmarks/kernels.py as a command",
        "network_reports_plausible_bytes_and_times": "benchmarks/network.py, with real links",
        "scaling_reports_bytes_counting_and_compilation": "benchmarks/scaling.py as a command",
        "step_reports_ratios_to_momentum": "benchmarks/step.py as a command",
    },
    "test_elastic_faults": {
        "kills_are_survived_and_reported": "benchmarks/elastic_faults.py kills, end to end",
        "links_report_the_steps_of_the_other_workers": "benchmarks/elastic_faults.py links",
        "taps_delay_packets_and_a_worker_can_be_cut_off": "benchmarks/forwarder.py",
    },
    "test_endurance": {
        "a_thousand_steps_with_an_excluded_worker_in_each": "slow drifts between replicas",
    },
    "test_examples": {
        "a_short_run_writes_its_report_and_the_vote_sends_few_bytes": "the demo's own code",
        "the_voted_run_is_as_accurate_as_adamw": "the demo's claim",
    },
    "test_language_model": {
        "a_short_run_writes_its_report": "the example's own code",
        "a_stopped_and_continued_run_equals_an_uninterrupted_run": "the example's checkpoints",
        "network_trains_in_processes_and_compares_times": "benchmarks/language_model.py network",
        "tune_searches_one_grid_with_all_seeds_and_resumes": "benchmarks/language_model.py tune",
    },
    "test_shard_command": {
        "servers_are_killed_while_jobs_vote": "a write that SIGKILL interrupts, on either server",
    },
    "test_diloco": {
        "few_bits_without_feedback_learn_as_well_as_the_mean": "a claim of the documentation",
    },
    "test_learning": {
        "eight_local_steps_for_each_vote_reach_the_same_loss": "a claim of the documentation",
        "with_small_batches_error_feedback_matches_sgd_and_scaled_signs_do_not": "a claim of [4]",
    },
    "test_loops": {
        "a_whole_run_learns_the_digits": "the examples' own code",
        "pmap_and_shard_map_give_the_same_results": "differences between the maps",
    },
    "test_multihost": {
        "a_missing_process_times_out": "a launcher that waits forever",
        "a_preempted_cluster_loses_no_step": "signals",
        "a_process_that_dies_ends_the_run": "survivors of a death",
        "a_process_that_hangs_ends_the_run": "survivors that wait forever",
        "a_stopped_and_continued_run_equals_an_uninterrupted_run": "processes and checkpoints",
        "an_interrupt_ends_all_processes": "processes that outlive their launcher",
        "kills_at_any_moment_do_not_change_the_parameters": "checkpoints that are cut short",
        "rejects_continuing_a_run_of_other_settings": "a checkpoint of another run",
        "resize_continues_with_another_number_of_workers": "resize across processes, end to end",
        "shows_the_error_of_a_process_that_died": "messages that nobody sees",
    },
    "test_notebooks": {"a_notebook_runs_and_its_claims_hold": "the sources' claims"},
    "test_state": {"resize_works_across_processes": "shardings of several processes"},
    "test_launch": {
        "processes_under_slurm_find_each_other_and_train": "JAX's detection of Slurm, end to end",
        "ray_trains_on_two_processes": "Ray's JaxTrainer, where ray is installed",
        "two_machines_of_the_skypilot_task_train_together": "the SkyPilot task's commands",
        "two_pods_of_the_jobset_train_together": "the JobSet's command",
    },
    "test_sweep": {
        "methods_train_and_finished_runs_are_left_out": "benchmarks/sweep_methods.py",
        "runs_by_vmap_equal_runs_on_a_mesh": "benchmarks/sweep.py",
    },
    "test_scopes": {
        "a_profile_of_voted_steps_shows_every_part": "benchmarks/trace.py, and names in a profile",
    },
    "test_pod": {
        "one_process_for_each_slice_gives_the_same_losses_and_bytes": "other programs",
        "slices_learn_and_only_bits_cross_between_them": "the example's own code",
        "tells_slices_apart_whose_number_divides_their_size": "groups as large as the slices",
    },
}
