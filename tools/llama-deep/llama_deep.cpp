// Decode speed of llama.cpp deep in the context, for one or more sequences that run together.
//
// llama-bench and llama-batched-bench compute the whole depth first, which takes a quarter of an
// hour for a 1.1B model at 16K. Here 512 tokens are computed; their saved state is tiled to the
// depth and restored into each sequence's own cache. Keys and values repeat, their bytes are read
// all the same. Prints rows as `llama-bench -o json` does.

#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

constexpr int TILE = 512;

struct Test {
    std::string model;
    int sequences = 1, depth = 0, generated = 8, repeats = 3, threads = 2;
    ggml_type keys = GGML_TYPE_F16, values = GGML_TYPE_F16;
    std::vector<bool> flash = {true};
};

/// A saved state that is read from the front and copied, widened, to another.
class Tiler {
public:
    Tiler(const std::vector<uint8_t> & from, int depth) : from_(from), depth_(depth) {}

    /// The layout is that of `llama_kv_cache::state_write`: magic, sequence, streams; for each
    /// stream its cells (position and owners), then rows of keys and of values of each layer.
    std::vector<uint8_t> run() {
        copy(4);
        copy(4);
        const uint32_t streams = copy_u32();
        for (uint32_t stream = 0; stream < streams; ++stream) {
            const uint32_t cells = peek<uint32_t>();
            if (cells == 0) {
                copy(4);
                continue;
            }
            expect(cells == TILE, "cells");
            skip(4);
            put(uint32_t(depth_));
            for (int position = 0; position < depth_; ++position) {
                put(int32_t(position));
                put(uint32_t(1));
                put(int32_t(0));
            }
            skip(size_t(TILE) * 12);
            const bool transposed = copy_u32() != 0;
            const uint32_t layers = copy_u32();
            for (uint32_t layer = 0; layer < layers; ++layer) {
                rows();
            }
            for (uint32_t layer = 0; layer < layers; ++layer) {
                transposed ? columns() : rows();
            }
        }
        expect(at_ == from_.size(), "length");
        return std::move(to_);
    }

private:
    void rows() {
        copy(4);
        const uint64_t row = peek<uint64_t>();
        copy(8);
        tile(row);
    }

    void columns() {
        copy(4);
        const uint32_t element = copy_u32();
        const uint32_t channels = copy_u32();
        for (uint32_t channel = 0; channel < channels; ++channel) {
            tile(element);
        }
    }

    void tile(size_t bytes_of_token) {
        expect(at_ + bytes_of_token * TILE <= from_.size(), "rows");
        for (int done = 0; done < depth_; done += TILE) {
            const auto first = from_.begin() + at_;
            to_.insert(to_.end(), first, first + std::min(TILE, depth_ - done) * bytes_of_token);
        }
        skip(bytes_of_token * TILE);
    }

    template <typename T> T peek() const {
        expect(at_ + sizeof(T) <= from_.size(), "end");
        T value;
        std::memcpy(&value, &from_[at_], sizeof value);
        return value;
    }

    template <typename T> void put(T value) {
        const auto * bytes = reinterpret_cast<const uint8_t *>(&value);
        to_.insert(to_.end(), bytes, bytes + sizeof value);
    }

    uint32_t copy_u32() {
        const auto value = peek<uint32_t>();
        copy(4);
        return value;
    }

    void copy(size_t bytes) {
        expect(at_ + bytes <= from_.size(), "end");
        to_.insert(to_.end(), from_.begin() + at_, from_.begin() + at_ + bytes);
        at_ += bytes;
    }

    void skip(size_t bytes) { at_ += bytes; }

    static void expect(bool holds, const char * what) {
        if (!holds) {
            throw std::runtime_error(std::string("this llama.cpp saves states in another layout: ") + what);
        }
    }

    const std::vector<uint8_t> & from_;
    std::vector<uint8_t> to_;
    size_t at_ = 0;
    int depth_;
};

class Context {
public:
    Context(llama_model * model, const Test & test, bool flash) : batch_(llama_batch_init(TILE, 0, 1)) {
        auto params = llama_context_default_params();
        const int tokens = test.depth + test.generated * (test.repeats + 1) + TILE;
        params.n_ctx = uint32_t(tokens + 255) / 256 * 256 * test.sequences;
        params.n_seq_max = test.sequences;
        params.kv_unified = false;
        params.n_threads = params.n_threads_batch = test.threads;
        params.n_batch = params.n_ubatch = TILE;
        params.flash_attn_type = flash ? LLAMA_FLASH_ATTN_TYPE_ENABLED : LLAMA_FLASH_ATTN_TYPE_DISABLED;
        params.type_k = test.keys;
        params.type_v = test.values;
        context_ = llama_init_from_model(model, params);
        if (!context_) {
            throw std::runtime_error("llama.cpp makes no context of these types");
        }
    }

    ~Context() {
        llama_batch_free(batch_);
        llama_free(context_);
    }

    void add(int token, int position, int sequence, bool logits) {
        const int i = batch_.n_tokens++;
        batch_.token[i] = token;
        batch_.pos[i] = position;
        batch_.n_seq_id[i] = 1;
        batch_.seq_id[i][0] = sequence;
        batch_.logits[i] = logits;
    }

    void decode() {
        if (llama_decode(context_, batch_) != 0) {
            throw std::runtime_error("llama_decode failed");
        }
        llama_synchronize(context_);
        batch_.n_tokens = 0;
    }

    void fill(const Test & test) {
        for (int i = 0; i < TILE; ++i) {
            add(1 + i * 7919 % 20000, i, 0, i == TILE - 1);
        }
        decode();
        std::vector<uint8_t> state(llama_state_seq_get_size(context_, 0));
        if (llama_state_seq_get_data(context_, state.data(), state.size(), 0) != state.size()) {
            throw std::runtime_error("llama_state_seq_get_data failed");
        }
        const auto deep = Tiler(state, test.depth).run();
        for (int sequence = 0; sequence < test.sequences; ++sequence) {
            if (llama_state_seq_set_data(context_, deep.data(), deep.size(), sequence) != deep.size()) {
                throw std::runtime_error("llama_state_seq_set_data failed");
            }
        }
    }

private:
    llama_context * context_ = nullptr;
    llama_batch batch_;
};

std::vector<double> speeds(llama_model * model, const Test & test, bool flash) {
    Context context(model, test, flash);
    if (test.depth > 0) {
        context.fill(test);
    }
    std::vector<double> samples;
    int position = test.depth;
    for (int repeat = 0; repeat <= test.repeats; ++repeat) {
        const auto start = std::chrono::steady_clock::now();
        for (int step = 0; step < test.generated; ++step, ++position) {
            for (int sequence = 0; sequence < test.sequences; ++sequence) {
                context.add(5 + (position * 31 + sequence) % 10000, position, sequence, true);
            }
            context.decode();
        }
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        if (repeat > 0) {  // the first one warms up
            samples.push_back(test.sequences * test.generated / took.count());
        }
    }
    return samples;
}

ggml_type type_of(const std::string & name) {
    static const std::map<std::string, ggml_type> types = {
        {"f32", GGML_TYPE_F32}, {"f16", GGML_TYPE_F16}, {"q8_0", GGML_TYPE_Q8_0}, {"q4_0", GGML_TYPE_Q4_0}};
    const auto found = types.find(name);
    if (found == types.end()) {
        throw std::runtime_error(name + " is none of f32, f16, q8_0, q4_0");
    }
    return found->second;
}

Test parse(int count, char ** words) {
    Test test;
    for (int i = 1; i < count; i += 2) {
        const std::string flag = words[i];
        if (i + 1 == count) {
            throw std::runtime_error(flag + " has no value");
        }
        const std::string value = words[i + 1];
        const auto number = [&] { return std::max(0, std::atoi(value.c_str())); };
        if (flag == "-m") test.model = value;
        else if (flag == "-s") test.sequences = std::max(1, number());
        else if (flag == "-d") test.depth = number();
        else if (flag == "-n") test.generated = std::max(1, number());
        else if (flag == "-r") test.repeats = std::max(1, number());
        else if (flag == "-t") test.threads = std::max(1, number());
        else if (flag == "-ctk") test.keys = type_of(value);
        else if (flag == "-ctv") test.values = type_of(value);
        else if (flag == "-fa") {
            test.flash.clear();
            for (char c : value) {
                if (c == '0' || c == '1') test.flash.push_back(c == '1');
            }
        } else {
            throw std::runtime_error(flag + " is none of -m -s -d -n -r -t -ctk -ctv -fa");
        }
    }
    return test;
}

}  // namespace

int main(int count, char ** words) {
    try {
        const Test test = parse(count, words);
        llama_log_set([](ggml_log_level level, const char * text, void *) {
            if (level == GGML_LOG_LEVEL_ERROR) std::fputs(text, stderr);
        }, nullptr);
        llama_backend_init();
        llama_model * model = llama_model_load_from_file(test.model.c_str(), llama_model_default_params());
        if (!model) {
            throw std::runtime_error(test.model + " cannot be loaded");
        }
        std::printf("[");
        for (size_t i = 0; i < test.flash.size(); ++i) {
            const auto samples = speeds(model, test, test.flash[i]);
            std::printf("%s\n  {\"n_seq\": %d, \"n_depth\": %d, \"n_gen\": %d, \"flash_attn\": %s, \"samples_ts\": [",
                        i ? "," : "", test.sequences, test.depth, test.generated, test.flash[i] ? "true" : "false");
            for (size_t j = 0; j < samples.size(); ++j) {
                std::printf("%s%.4f", j ? ", " : "", samples[j]);
            }
            std::printf("]}");
            std::fflush(stdout);
        }
        std::printf("\n]\n");
        llama_model_free(model);
    } catch (const std::exception & error) {
        std::fprintf(stderr, "llama_deep: %s\n", error.what());
        return 1;
    }
}
